"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts-data"), words = read("words-data"), lang = document.documentElement.lang;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // plotly reads names as a little HTML; they come from files
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const several = charts.some((chart) => chart.series.some((series) => series.run > 0));

  const trace = (chart) => (series) => {
    const part = words[series.part] || series.part, ink = colour(`--run-${series.run % 6}`), few = series.x.length < 60;
    const held = series.part === "validation";
    return {
      x: series.x, y: series.y, name: plain([several || !part ? series.name : "", part].filter(Boolean).join(" · ")),
      type: "scatter", connectgaps: false,
      mode: chart.kind === "line" && few ? "lines+markers" : "lines",
      fill: chart.kind === "bars" ? "tozeroy" : "none",
      line: {color: ink, width: 2, dash: held ? "dash" : "solid", shape: chart.kind === "bars" ? "hvh" : "linear"},
      marker: {color: ink, size: held ? 8 : 5, symbol: held ? "diamond" : "circle"},
      hovertemplate: chart.kind === "bars" ? "%{y:,}" : "%{y:.5g}",
      showlegend: several || Boolean(part),
    };
  };

  const layout = (chart) => {
    const axis = {gridcolor: colour("--grid"), linecolor: colour("--rule"), zeroline: false, automargin: true};
    const steps = chart.series.flatMap((series) => series.x);
    const few = chart.kind === "line" && Math.max(...steps) - Math.min(...steps) < 8;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: colour("--ink"), family: getComputedStyle(document.body).fontFamily, size: 13},
      margin: {l: 8, r: 12, t: 28, b: 8}, hovermode: "x unified", hoverdistance: -1,
      hoverlabel: {bgcolor: colour("--paper"), bordercolor: colour("--rule"), font: {color: colour("--ink")}},
      legend: {orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--link")},
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",  // a finger scrolls the page
      xaxis: {...axis, title: {text: chart.kind === "bars" ? words.length : words.step}, ...(few ? {dtick: 1} : {}),
        hoverformat: ",.0f"},
      yaxis: {...axis, exponentformat: "e", ...(chart.kind === "bars" ? {rangemode: "tozero"} : {})},
    };
  };

  const dictionary = Object.fromEntries(
    Object.entries(words).filter(([key]) => key.startsWith("plotly_")).map(([key, value]) => [key.slice(7), value]));
  const config = {
    responsive: true, displaylogo: false, displayModeBar: true, locale: lang, locales: {[lang]: {dictionary, format: {}}},
    // by name: plotly's own set has a button that uploads the chart
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const draw = () => charts.forEach((chart, index) =>
    Plotly.react(`chart-${index}`, chart.series.map(trace(chart)), layout(chart), config));
  const onPaper = (on) => () => { document.documentElement.classList.toggle("on-paper", on); draw(); };
  draw();
  dark.addEventListener("change", draw);
  addEventListener("beforeprint", onPaper(true));
  addEventListener("afterprint", onPaper(false));
})();
