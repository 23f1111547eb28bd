"""What a run leaves on disk, and how it is read back. Of the other rooms, imports all but `launch`.

A folder for each run: `config.yaml` (resolved), `metrics.csv` (a row an epoch, as it goes), `checkpoint.pt` (while the
run is not over) and `summary.json` (written last: a folder without it holds an unfinished run). Every file is written
whole or not at all.
"""
