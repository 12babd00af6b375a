"""The cleaned graph on its way out: to the upstream lowerings and to Neuron. Third parties are imported when used, not before."""
