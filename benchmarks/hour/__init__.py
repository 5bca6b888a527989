"""The parts of `python -m benchmarks.gpu_hour`.

`runner` gives every part a process and a share of the time, `record` is the file that it fills row
by row, `work` what it is handed; `report` puts the files together.
"""
