"""Floor 4: weights in and out. One table of names (`layout`), and a file for each format that reads or writes by it."""
