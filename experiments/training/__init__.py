"""Networks and their training on a device. Of the other rooms, imports `command`, `config` and `data`."""
