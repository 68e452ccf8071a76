"""How do rows become batches? One direction, from files to tensors: each module imports only from those listed before it.

Building blocks    row, fields, tools, turns, usage, columns, provenance
Files to rows      decode, shapes, json_files, table, documents, parquet, files, load, renamed
Rows to tokens     encode, weights, formats, parse, labelled, labels, questions, records
Chats to tokens    chat_sample, chat_fit, chat_render, chat_template, chat_answers, chat
Tokens to files    chunk, workers, holdout, split, cache, pack, prepare, sources
Files to batches   sequences, sampler, mixture, collate, audit
Streaming          units, window, stream, streamable
"""
