"""Slow and obvious: what hf_doge.sampling must agree with. Shares no code with it."""

from fractions import Fraction


def largest_deficit(weights, num_draws):
    """Each draw goes to the domain furthest behind its share."""
    counts, drawn = [0] * len(weights), []
    for draw in range(1, num_draws + 1):
        deficits = [draw * weight - count for weight, count in zip(weights, counts, strict=True)]
        domain = deficits.index(max(deficits))
        counts[domain] += 1
        drawn.append(domain)
    return drawn


def earliest_deadline(weights, num_draws):
    """Of the domains whose count would stay below share + 1, the one that must be drawn soonest, in exact fractions."""
    weights = [Fraction(weight).limit_denominator(10**9) for weight in weights]  # 3/10, not the double nearest to it
    counts, drawn = [0] * len(weights), []
    for draw in range(1, num_draws + 1):
        allowed = [i for i, weight in enumerate(weights) if weight > 0 and counts[i] + 1 < draw * weight + 1]
        domain = min(allowed, key=lambda i: -(-(counts[i] + 1) // weights[i]))
        counts[domain] += 1
        drawn.append(domain)
    return drawn


def largest_difference(drawn, weights):
    """The largest |count - draws * weight| of any domain after any number of draws."""
    counts, largest = [0] * len(weights), 0
    for number, domain in enumerate(drawn, start=1):
        counts[domain] += 1
        largest = max(largest, *(abs(c - number * w) for c, w in zip(counts, weights, strict=True)))
    return largest


def capped_shares(weights, limits):
    """Shares in proportion to the weights, none above its limit: the scale is found by bisection."""
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        total = sum(min(middle * weight, limit) for weight, limit in zip(weights, limits, strict=True))
        low, high = (middle, high) if total < 1 else (low, middle)
    return [min(high * weight, limit) for weight, limit in zip(weights, limits, strict=True)]
