"""Short programs to start from, each of which is run by the tests."""
