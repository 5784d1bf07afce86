"""Floor 6: the command line. `commands` has the table of commands, and each command has a file of its own.

`parser` has the one class of parsers and the flags that commands share, `exits` the one way in which commands end.
"""
