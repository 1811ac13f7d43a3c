"""What the command line does: a config becomes objects (``assemble``), and train, sample, evaluate run them."""
