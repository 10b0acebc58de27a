"""A cluster on one machine: real servers, clones that share no file, and faults one by one; see README.md."""
