//! `Retry-After` header (RFC 9110, 10.2.3): seconds, or a date. A plugin has no clock, so a date is
//! compared with the response's own `Date` header.

use crate::bindings::exports::batchwright::plugin::inference::Header;
use crate::header::header;

/// Returns the delay that the provider asks for, in milliseconds. OpenAI and Azure add
/// `retry-after-ms` for delays below a second.
pub(crate) fn retry_after_milliseconds(headers: &[Header]) -> Option<u64> {
    if let Some(milliseconds) = header(headers, "retry-after-ms").and_then(number) {
        return Some(milliseconds);
    }
    let value = header(headers, "retry-after")?.trim();
    if let Some(seconds) = number(value) {
        return Some(seconds.saturating_mul(1000));
    }
    let until = unix_seconds(value)?;
    let now = unix_seconds(header(headers, "date")?.trim())?;
    Some(until.saturating_sub(now).saturating_mul(1000))
}

/// Parses a number that is not negative, rounded up.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    text.parse().ok().or_else(|| {
        let value: f64 = text.parse().ok()?;
        (value.is_finite() && value >= 0.0).then_some(value.ceil() as u64)
    })
}

/// Reads an IMF-fixdate such as `Sun, 06 Nov 1994 08:49:37 GMT`.
fn unix_seconds(date: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = date.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month_name = words.next()?;
    let month = MONTHS.iter().position(|name| *name == month_name)? as u64 + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut clock = words.next()?.split(':').map(|part| part.parse::<u64>().ok());
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    if words.next() != Some("GMT") || day > 31 || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days since 1970-01-01 in the Gregorian calendar. Years begin in March, so that the leap day
    // is the last day of a year.
    let shifted = if month > 2 { year } else { year - 1 };
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day.checked_sub(1)?;
    let days = shifted * 365 + shifted / 4 - shifted / 100 + shifted / 400 + of_year;
    Some(days.checked_sub(719_468)? * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(headers: &[(&str, &str)]) -> Option<u64> {
        let headers: Vec<Header> = headers
            .iter()
            .map(|(name, value)| Header { name: (*name).into(), value: (*value).into() })
            .collect();
        retry_after_milliseconds(&headers)
    }

    #[test]
    fn dates_are_parsed_as_unix_seconds() {
        assert_eq!(unix_seconds("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(unix_seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(unix_seconds("Thu, 29 Feb 2024 23:59:59 GMT"), Some(1_709_251_199));
        assert_eq!(unix_seconds("Sunday, 06-Nov-94 08:49:37 GMT"), None);
        assert_eq!(unix_seconds("Sun, 00 Nov 1994 08:49:37 GMT"), None);
    }

    #[test]
    fn seconds_fractions_milliseconds_and_dates_are_parsed() {
        assert_eq!(after(&[("retry-after", "3")]), Some(3000));
        assert_eq!(after(&[("retry-after", "0.4")]), Some(1000));
        assert_eq!(after(&[("retry-after", "20"), ("retry-after-ms", "150")]), Some(150));
        let date = ("date", "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(after(&[("Retry-After", "Sun, 06 Nov 1994 08:50:37 GMT"), date]), Some(60_000));
        assert_eq!(after(&[("Retry-After", "Sun, 06 Nov 1994 08:00:00 GMT"), date]), Some(0));
        assert_eq!(after(&[("Retry-After", "soon"), date]), None);
        assert_eq!(after(&[]), None);
        assert_eq!(after(&[("retry-after", "99999999999999999999")]), Some(u64::MAX));
    }
}
