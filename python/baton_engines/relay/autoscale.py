"""Adapts the number of slots to the load within bounds."""


class Autoscale:
    """At least doubles the slots at once when queries wait and no row is free; halves them after
    half of the rows have sufficed for a while. So changes, which copy all rows, are rare.

    Args:
        low: the smallest number of slots.
        high: the largest number of slots.
        patience: shrinks after half of the rows have sufficed in this many iterations in a row.
    """

    def __init__(self, low: int, high: int, patience: int = 16):
        self.low = low
        self.high = high
        self.patience = patience
        self._calm = 0

    def wanted(self, num_slots: int, running: int, waiting: int) -> int:
        """The number of slots for the next iteration.

        Args:
            num_slots: the current number.
            running: the number of queries with a row.
            waiting: the number of queries without one.
        """
        demand = running + waiting
        # If a row is free although queries wait, more rows would not help.
        full = running == 0 or running >= num_slots
        if full and demand > num_slots:
            self._calm = 0
            return min(self.high, max(demand, 2 * num_slots))
        half = max(self.low, num_slots // 2)
        self._calm = self._calm + 1 if demand <= half < num_slots else 0
        if self._calm < self.patience:
            return num_slots
        self._calm = 0
        return half
