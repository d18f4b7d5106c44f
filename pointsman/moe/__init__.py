"""The experts: gate, route, capture, run. A layer asks for a Routing, may record or replay it, and gives it to a runner."""
