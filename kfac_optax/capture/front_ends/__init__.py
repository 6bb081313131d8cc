"""Where taps come from: Flax modules, and taps that users place themselves."""
