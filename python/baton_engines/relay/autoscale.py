"""A number of slots that follows the load within bounds."""


class Autoscale:
    """Grows at once when queries wait and no row is free, at least to the double; shrinks by half
    when half of the rows would do for a while. So that a change, which copies all rows, is rare.

    Args:
        low: the fewest slots.
        high: the most slots.
        patience: iterations in a row in which half of the rows would have done, before they go.
    """

    def __init__(self, low: int, high: int, patience: int = 16):
        self.low = low
        self.high = high
        self.patience = patience
        self._calm = 0

    def wanted(self, num_slots: int, running: int, waiting: int) -> int:
        """The number of slots for the next iteration.

        Args:
            num_slots: those that there are.
            running: queries with a row.
            waiting: queries without.
        """
        demand = running + waiting
        # A row that is free while others wait is not free for lack of rows.
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
