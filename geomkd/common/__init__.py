"""What every station uses: checks of input, files, processes, randomness, folders of results."""
