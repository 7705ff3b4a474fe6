"""Lightning's side: the strategies."""
