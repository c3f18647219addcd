"""The paper: where mathematics (flow/) meets networks (models/)."""
