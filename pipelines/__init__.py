"""Ray Data and Ray Train jobs: prepare, train, embed, index, evaluate. See README.md."""
