"""The data sets, from files to tensors. Of the other rooms, imports `command` and `config`.

Nothing is imported here: `cifar_files` serves the download, which runs before anything is installed.
"""
