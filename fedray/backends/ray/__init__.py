"""Clients on a Ray cluster: the only part of fedray that imports ray, and only when it is used."""
