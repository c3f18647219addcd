"""The paper's methods at equal compute: a grid of cells, one method at one seed each, and its report."""
