"""From labelled images to a release that is better: views, objective, trainer, evaluation, gate."""
