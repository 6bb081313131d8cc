"""How the blocks of different layers talk."""
