"""The command line: `alluxiofuse`. Layer 4, and the only part that knows all others.

`main` is the entry point and the one place where errors become a line and an exit code. Each
`cmd_*` module holds commands and imports what is heavy only when a command runs, so that `--help`
and `fs` commands start fast. `assembly` puts daemons together.
"""
