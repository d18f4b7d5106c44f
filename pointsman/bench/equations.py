"""Arithmetic written out in steps that a very small model can take one at a time.

Every function returns the value and the right-hand sides that lead to it: an addend is added place by place, a product is a sum of
products of single digits, a quotient grows digit by digit. The form is canonical: one text for each pair of operands.
"""


def places(number: int) -> list[int]:
    """The non-zero places of a number, highest first: 1304 -> [1000, 300, 4]."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - index - 1) for index, digit in enumerate(digits) if digit != "0"]


def add(left: int, right: int) -> tuple[int, list[str]]:
    """36 + 48 = 76 + 8 = 84."""
    parts = places(right)
    sides = []
    for index, part in enumerate(parts[:-1]):
        left += part
        sides.append(f"{left} + {sum(parts[index + 1 :])}")
    left += sum(parts[-1:])
    return left, [*sides, str(left)]


def subtract(left: int, right: int) -> tuple[int, list[str]]:
    """84 - 48 = 44 - 8 = 36."""
    parts = places(right)
    sides = []
    for index, part in enumerate(parts[:-1]):
        left -= part
        sides.append(f"{left} - {sum(parts[index + 1 :])}")
    left -= sum(parts[-1:])
    return left, [*sides, str(left)]


def multiply(left: int, right: int) -> tuple[int, list[str]]:
    """236 * 7 = 1400 + 210 + 42 = 1610 + 42 = 1652."""
    parts = [x * y for y in places(right) for x in places(left)]
    sides = []
    while len(parts) > 1:
        sides.append(" + ".join(map(str, parts)))
        parts = [parts[0] + parts[1], *parts[2:]]
    return left * right, [*sides, str(left * right)]


def divide(left: int, right: int) -> tuple[int, list[str]]:
    """1652 / 7 = 200 + 252 / 7 = 230 + 42 / 7 = 236; a divisor that ends in 0 loses it first: 720 / 40 = 72 / 4 = 18."""
    quotient, remainder = divmod(left, right)
    if remainder:
        raise ValueError(f"{left} is not a multiple of {right}")
    sides = []
    while right > 10 and right % 10 == 0 and left % 10 == 0:
        left, right = left // 10, right // 10
        sides.append(f"{left} / {right}")
    done = 0
    for part in places(quotient)[:-1] if right != 10 else []:
        done += part
        sides.append(f"{done} + {left - done * right} / {right}")
    return quotient, [*sides, str(quotient)]


OPERATIONS = {"+": add, "-": subtract, "*": multiply, "/": divide}


def equation(left: int, operator: str, right: int) -> tuple[int, str]:
    """The value and the whole equation, the longer factor of a product first."""
    if operator == "*" and len(places(right)) > len(places(left)):
        left, right = right, left
    value, sides = OPERATIONS[operator](left, right)
    return value, " = ".join([f"{left} {operator} {right}", *sides])
