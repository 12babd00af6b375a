"""What the Neuron compiler refuses, predicted from the graph: the rules of the pass check-constraints."""
