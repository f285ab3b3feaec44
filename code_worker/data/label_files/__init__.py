"""Files of labels, as people and labelling tools write them: read row by row, a bad row spoils no other."""
