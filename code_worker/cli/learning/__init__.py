"""Commands of the learning loop: labels, data sets, runs, schedules."""
