"""What a run leaves on disk, and how it is read back. Of the other rooms, imports all but `launch`."""
