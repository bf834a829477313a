"""`python -m benchmarks`: our operations side by side with torch's, in one process.

One module per role: `shapes` (what models look like), `workload` (buffers), `ours` and `peers` (the
candidates), `case` and `cases` (what is measured), `batch_norm` and `batch_norm_candidates` (the
same for layers), `timer` and `device_timer` (interleaved laps), `measure` (derived numbers, copy
bandwidth), `device` (CPU or GPU), `summary` and `targets` (means, floors), `source` and
`environment`, `run`, `report` and `table`; `result_tables` and `page` (what a result file says).
"""
