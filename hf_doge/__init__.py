"""Learn how much of each kind of data to train on (DoGE), and trace predictions to training text (TracIn-WE)."""
