"""A layer of each neuron type as ``gpulayers new`` writes it: MyLayer takes the name that was asked for."""
