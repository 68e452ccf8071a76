"""Search Chinese pages by pairs of characters, since Sphinx indexes no Chinese word without a dictionary package.

`檢查點` becomes `檢查` and `查點`, in the index and in the query, and a page is found that has all pairs of the query.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx
from sphinx.search.zh import SearchChinese

_WORDS = re.compile(r"[\u3400-\u9fff]+|[a-zA-Z0-9_]+")


class CharacterPairs(SearchChinese):
    """Pairs of Chinese characters, and Latin words as in English."""

    lang = "zh_TW"
    language_name = "English"  # of the stemmer in the browser; Sphinx 9.0 names one that does not exist, and search fails
    # the same in the browser; without characters that a template would escape
    js_splitter_code = r"""
function splitQuery(query) {
  return (query.match(/[\u3400-\u9fff]+|[a-zA-Z0-9_]+/g) || []).flatMap(function (word) {
    if (!/[\u3400-\u9fff]/.test(word)) return [word];
    return Array.from({length: word.length - 1}, function (_, start) { return word.slice(start, start + 2); });
  });
}
"""

    def split(self, input: str) -> list[str]:
        """The terms of a text."""
        terms: list[str] = []
        for word in _WORDS.findall(input):
            if word.isascii():
                self.latin_terms.add(word)
                terms.append(word)
            else:
                terms += [word[start : start + 2] for start in range(len(word) - 1)]
        return terms


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_search_language(CharacterPairs)
    return {"parallel_read_safe": True}
