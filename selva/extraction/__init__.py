"""From clips to feature files and data sets: read ahead, encoded, written, accounted for."""
