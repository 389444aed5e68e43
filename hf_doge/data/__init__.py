"""What the commands train on: domains out of folders, mixtures and data sets of the Hub, as blocks of tokens."""
