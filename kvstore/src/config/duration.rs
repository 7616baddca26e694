//! Durations as Go writes them: `1h30m`, `1.5s`, `-250ms`, and what Go says of anything else.
//!
//! What it does not do: decide whether a duration makes sense.

/// Units and their nanoseconds.
const UNITS: &[(&str, u64)] = &[
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Nanoseconds, or `time.ParseDuration`'s words.
pub(super) fn parse(text: &str) -> Result<i64, String> {
    let invalid = || format!("time: invalid duration {text:?}");
    let negative = text.starts_with('-');
    let mut rest = text.strip_prefix(['+', '-']).unwrap_or(text);
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total_ns: u64 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        // Go counts the digits before it looks for a unit.
        if !whole.is_empty() && !whole.parse::<u64>().is_ok_and(|whole| whole <= 1 << 63) {
            return Err(invalid());
        }
        let unit_end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        if unit.is_empty() {
            return Err(format!("time: missing unit in duration {text:?}"));
        }
        let Some((_, unit_ns)) = UNITS.iter().find(|(name, _)| *name == unit) else {
            return Err(format!("time: unknown unit {unit:?} in duration {text:?}"));
        };
        let part_ns = part(whole, fraction, *unit_ns).ok_or_else(invalid)?;
        total_ns = total_ns.checked_add(part_ns).filter(|ns| *ns <= 1 << 63).ok_or_else(invalid)?;
        rest = after;
    }
    match i64::try_from(total_ns) {
        Ok(ns) if negative => Ok(-ns),
        Ok(ns) => Ok(ns),
        Err(_) if negative => Ok(i64::MIN),
        Err(_) => Err(invalid()),
    }
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `whole.fraction` units in nanoseconds; `None`: too many. Digits of the fraction that can't matter are cut.
fn part(whole: &str, fraction: &str, unit_ns: u64) -> Option<u64> {
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    let fraction_ns = u64::try_from(fraction * u128::from(unit_ns) / scale).ok()?;
    whole.checked_mul(unit_ns)?.checked_add(fraction_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_go_reads_them() {
        let seconds = 1_000_000_000;
        assert_eq!(parse("1h30m"), Ok(5400 * seconds));
        assert_eq!(parse("1.5s"), Ok(3 * seconds / 2));
        assert_eq!(parse(".5s"), Ok(seconds / 2));
        assert_eq!(parse("5.s"), Ok(5 * seconds));
        assert_eq!(parse("-5m"), Ok(-300 * seconds));
        assert_eq!(parse("+3us"), Ok(3_000));
        assert_eq!(parse("-0"), Ok(0));
        assert_eq!(parse("9223372036854775807ns"), Ok(i64::MAX));
        assert_eq!(parse("-9223372036854775808ns"), Ok(i64::MIN));
        assert_eq!(parse("0.3333333333333333333h"), Ok(1_199_999_999_999));
    }

    #[test]
    fn as_go_refuses_them() {
        let says = |text: &str| parse(text).unwrap_err();
        for text in ["", "-", "abc", "s", ".s", "9999999999999999999", "9223372036854775808ns", "3000000h"] {
            assert_eq!(says(text), format!("time: invalid duration {text:?}"), "{text}");
        }
        assert_eq!(says("1.5"), "time: missing unit in duration \"1.5\"");
        assert_eq!(says("1h1"), "time: missing unit in duration \"1h1\"");
        assert_eq!(says("3x"), "time: unknown unit \"x\" in duration \"3x\"");
    }
}
