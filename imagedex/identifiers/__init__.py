"""Which identifier names which item: schemes, the k-means behind them, their vectors, and pictures that come later."""
