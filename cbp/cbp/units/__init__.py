"""Hidden units of any module: found, watched, evaluated and replaced. Here is Continual Backprop itself."""
