"""What every command shares: arguments, errors of one line, signals. Imports the standard library alone."""
