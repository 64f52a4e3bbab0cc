//! Calendars of schedules: when the next tick comes.
//!
//! Promises. L1: a text that is taken has a tick within the next century, and what is refused is told by the field and the part that is wrong.
//! L2: the tick behind an instant is a pure function of the calendar and the instant, and is later.
//! Not promised. That two members read a zone alike: each has the rules of time zones that it was built with.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Instants are milliseconds since 1970.
const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;
const EVERY_MAX: u64 = 366 * DAY;
/// Whatever recurs does so within a hundred years; nothing is looked for behind them.
const YEARS: &str = "1970-2199";

const NAMES: [(&str, &str); 7] = [
    ("@hourly", "0 * * * *"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@weekly", "0 0 * * 0"),
    ("@monthly", "0 0 1 * *"),
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
];

/// A field of five: what it is called, its bounds, and the words that it knows.
struct Field {
    name: &'static str,
    min: u64,
    max: u64,
    words: &'static [&'static str],
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", min: 0, max: 59, words: &[] },
    Field { name: "hour", min: 0, max: 23, words: &[] },
    Field { name: "day of the month", min: 1, max: 31, words: &["L", "W", "LW"] },
    Field {
        name: "month",
        min: 1,
        max: 12,
        words: &["JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"],
    },
    Field { name: "day of the week", min: 0, max: 7, words: &["L", "SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"] },
];

/// A calendar in its time zone.
#[derive(Debug)]
pub(crate) struct Calendar {
    rule: Rule,
    zone: TimeZone,
}

#[derive(Debug)]
enum Rule {
    Every(u64),
    Cron(Box<Cron>),
}

/// Why a calendar cannot be read: the field of the request, and a sentence.
#[derive(Debug, PartialEq)]
pub(crate) struct Wrong {
    pub(crate) field: &'static str,
    pub(crate) why: String,
}

impl Calendar {
    /// Reads a calendar; an empty zone is UTC.
    pub(crate) fn read(text: &str, zone: &str) -> Result<Self, Wrong> {
        let zone = read_zone(zone)?;
        let rule = read_rule(text).map_err(|why| Wrong { field: "calendar", why })?;
        Ok(Self { rule, zone })
    }

    /// The first tick behind an instant; `None`: none for a century.
    pub(crate) fn next_after(&self, at: u64) -> Option<u64> {
        let cron = match &self.rule {
            Rule::Every(length) => return at.checked_add(*length),
            Rule::Cron(cron) => cron,
        };
        let from = Timestamp::from_millisecond(i64::try_from(at).ok()?).ok()?.to_zoned(self.zone.clone());
        let next = cron.find_next_occurrence(&from, false).ok()?;
        u64::try_from(next.timestamp().as_millisecond()).ok().filter(|next| *next > at)
    }

    /// The last tick up to `now`, at or behind the tick `from`.
    pub(crate) fn last_until(&self, from: u64, now: u64) -> u64 {
        if let Rule::Every(length) = self.rule {
            return from + now.saturating_sub(from) / length * length;
        }
        // After a long outage of a frequent calendar nearly all ticks are skipped at once.
        let mut starts = [HOUR, DAY, 32 * DAY, 366 * DAY].map(|span| now.saturating_sub(span)).into_iter();
        let begins = |start: &u64| *start <= from || self.next_after(*start).is_some_and(|next| next <= now);
        let mut last = starts.find(begins).map_or(from, |start| start.max(from));
        while let Some(next) = self.next_after(last).filter(|next| *next <= now) {
            last = next;
        }
        last
    }

    /// The first ticks behind an instant.
    pub(crate) fn ticks_after(&self, at: u64, count: usize) -> Vec<u64> {
        std::iter::successors(self.next_after(at), |last| self.next_after(*last)).take(count).collect()
    }
}

fn read_zone(name: &str) -> Result<TimeZone, Wrong> {
    if name.is_empty() {
        return Ok(TimeZone::UTC);
    }
    let why = || format!("`{name}` is not the name of a time zone, such as `Europe/Berlin`");
    jiff::tz::db().get(name).map_err(|_| Wrong { field: "time_zone", why: why() })
}

fn read_rule(text: &str) -> Result<Rule, String> {
    let text = text.trim();
    if let Some(length) = text.strip_prefix("@every") {
        return read_every(length.trim()).map(Rule::Every);
    }
    let fields = match NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)) {
        Some((_, fields)) => fields,
        None if text.starts_with('@') => {
            let names = NAMES.map(|(name, _)| name).join(", ");
            return Err(format!("`{text}` is not known: there are {names} and @every"));
        }
        None => text,
    };
    let cron = read_fields(fields)?;
    let now = Timestamp::now().to_zoned(TimeZone::UTC);
    match cron.find_next_occurrence(&now, false) {
        Ok(_) => Ok(Rule::Cron(Box::new(cron))),
        Err(_) => Err(format!("`{text}` never comes: no month has such a day")),
    }
}

/// A length such as `90s` or `1h30m`.
fn read_every(text: &str) -> Result<u64, String> {
    let wrong = || format!("`@every {text}` has no length such as 90s, 15m or 1h30m, of whole numbers");
    let (mut rest, mut total) = (text, 0_u64);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = match rest.as_bytes()[digits] {
            b's' => SECOND,
            b'm' => MINUTE,
            b'h' => HOUR,
            b'd' => DAY,
            _ => return Err(wrong()),
        };
        total = number.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
        rest = &rest[digits + 1..];
    }
    match total {
        0 if text.is_empty() => Err(wrong()),
        SECOND..=EVERY_MAX => Ok(total),
        _ => Err(format!("`@every {text}` is not between a second and 366 days")),
    }
}

fn read_fields(text: &str) -> Result<Cron, String> {
    let texts: Vec<&str> = text.split_whitespace().collect();
    if texts.len() != FIELDS.len() {
        let names = FIELDS.each_ref().map(|field| field.name).join(", ");
        return Err(format!("`{text}` has {} fields where there are 5: {names}", texts.len()));
    }
    for (place, (field, text)) in FIELDS.iter().zip(&texts).enumerate() {
        let told = |why: String| {
            let Field { name, min, max, .. } = field;
            format!("field {}, the {name} ({min} to {max}), is `{text}`: {why}", place + 1)
        };
        field.check(text).map_err(told)?;
        // Each by itself, so that what is wrong is told of its field.
        let mut alone = ["*"; 5];
        alone[place] = text;
        parse(&alone.join(" ")).map_err(told)?;
    }
    parse(&texts.join(" "))
}

impl Field {
    /// What the parser would take otherwise than it is meant.
    fn check(&self, text: &str) -> Result<(), String> {
        let text = if self.name == "day of the week" { text.strip_prefix('+').unwrap_or(text) } else { text };
        for item in text.split(',') {
            if item.is_empty() {
                return Err("there is nothing where a value should be".to_owned());
            }
            let mut words = item.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty());
            if let Some(word) = words.find(|word| !self.words.iter().any(|known| known.eq_ignore_ascii_case(word))) {
                return Err(format!("`{word}` is not known here"));
            }
            let step = item.split_once('/').and_then(|(_, step)| step.parse::<u64>().ok());
            if let Some(step) = step.filter(|step| *step > self.max - self.min) {
                return Err(format!("a step of {step} leaves the field"));
            }
        }
        Ok(())
    }
}

fn parse(fields: &str) -> Result<Cron, String> {
    use croner::errors::CronError;
    let parser = CronParser::builder().seconds(Seconds::Required).year(Year::Required).build();
    parser.parse(&format!("0 {fields} {YEARS}")).map_err(|error| match error {
        CronError::ComponentError(why) | CronError::InvalidPattern(why) => {
            let mut letters = why.trim_end_matches('.').chars();
            letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
        }
        CronError::IllegalCharacters(_) => "a character does not belong here".to_owned(),
        other => other.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ticks` behind `from`, as they are written in RFC 3339.
    fn check(calendar: &str, zone: &str, from: &str, ticks: &[&str]) {
        let read = Calendar::read(calendar, zone).unwrap_or_else(|wrong| panic!("{calendar}: {wrong:?}"));
        let told = |at: u64| Timestamp::from_millisecond(at as i64).unwrap().to_string();
        let from = ms(from);
        let found: Vec<String> = read.ticks_after(from, ticks.len()).into_iter().map(told).collect();
        assert_eq!(found, ticks, "{calendar} {zone}");
    }

    fn ms(text: &str) -> u64 {
        text.parse::<Timestamp>().unwrap().as_millisecond() as u64
    }

    #[test]
    fn l2_the_next_ticks() {
        check("* * * * *", "", "2026-01-28T12:00:59.5Z", &["2026-01-28T12:01:00Z", "2026-01-28T12:02:00Z"]);
        check("*/15 9-10 * * mon-fri", "", "2026-01-30T10:30:00Z", &["2026-01-30T10:45:00Z", "2026-02-02T09:00:00Z"]);
        check("0 0 29 2 *", "", "2026-03-28T00:00:00Z", &["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"]);
        check("0 0 29 2 *", "", "2096-03-01T00:00:00Z", &["2104-02-29T00:00:00Z"]);
        check("0 0 29 2 +MON", "", "2026-03-28T00:00:00Z", &["2044-02-29T00:00:00Z", "2072-02-29T00:00:00Z"]);
        check("0 0 31 * *", "", "2026-01-31T00:00:00Z", &["2026-03-31T00:00:00Z", "2026-05-31T00:00:00Z"]);
        check("59 23 L * *", "", "2028-01-28T00:00:00Z", &["2028-01-31T23:59:00Z", "2028-02-29T23:59:00Z"]);
        check("0 0 LW * *", "", "2026-01-28T00:00:00Z", &["2026-01-30T00:00:00Z", "2026-02-27T00:00:00Z"]);
        check("0 0 15W * *", "", "2026-02-01T00:00:00Z", &["2026-02-16T00:00:00Z", "2026-03-16T00:00:00Z"]);
        check("0 0 * * FRI#L", "", "2026-01-28T00:00:00Z", &["2026-01-30T00:00:00Z", "2026-02-27T00:00:00Z"]);
        check("0 0 * * 5L", "", "2026-01-28T00:00:00Z", &["2026-01-30T00:00:00Z", "2026-02-27T00:00:00Z"]);
        check("0 0 * * mon#2", "", "2026-01-28T00:00:00Z", &["2026-02-09T00:00:00Z", "2026-03-09T00:00:00Z"]);
        check("0 0 ? JAN,dec 0", "", "2026-01-20T00:00:00Z", &["2026-01-25T00:00:00Z", "2026-12-06T00:00:00Z"]);
        check("0 0 * * 7", "", "2026-01-28T00:00:00Z", &["2026-02-01T00:00:00Z"]);
        // Either day suffices, both are asked for by `+`.
        check("0 0 13 * FRI", "", "2026-02-07T00:00:00Z", &["2026-02-13T00:00:00Z", "2026-02-20T00:00:00Z"]);
        check("0 0 13 * +FRI", "", "2026-02-13T00:00:00Z", &["2026-03-13T00:00:00Z", "2026-11-13T00:00:00Z"]);
        check("@hourly", "", "2026-12-31T23:00:00Z", &["2027-01-01T00:00:00Z", "2027-01-01T01:00:00Z"]);
        check("@Midnight", "Asia/Kolkata", "2026-01-28T00:00:00Z", &["2026-01-28T18:30:00Z"]);
        check("@weekly", "", "2026-01-28T00:00:00Z", &["2026-02-01T00:00:00Z", "2026-02-08T00:00:00Z"]);
        check("@yearly", "", "2026-01-01T00:00:00Z", &["2027-01-01T00:00:00Z"]);
        check("@every 1h30m", "", "2026-01-28T00:00:00.5Z", &["2026-01-28T01:30:00.5Z", "2026-01-28T03:00:00.5Z"]);
        check("@every 90s", "", "2026-01-28T00:00:00Z", &["2026-01-28T00:01:30Z", "2026-01-28T00:03:00Z"]);
    }

    #[test]
    fn clocks_that_go_forward_and_back() {
        let berlin = "Europe/Berlin";
        // On 29 March 02:00 is 03:00. A fixed time that is left out comes right after; one of several times is left out.
        check("30 2 * * *", berlin, "2026-03-28T12:00:00Z", &["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        check("*/30 2 * * *", berlin, "2026-03-28T12:00:00Z", &["2026-03-30T00:00:00Z", "2026-03-30T00:30:00Z"]);
        let hourly = ["2026-03-29T00:00:00Z", "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"];
        check("0 * * * *", berlin, "2026-03-28T23:30:00Z", &hourly);
        check("0 2,3 * * *", berlin, "2026-03-28T12:00:00Z", &["2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"]);
        // On 25 October 03:00 is 02:00 again. A fixed time comes once, an hourly one each hour.
        check("30 2 * * *", berlin, "2026-10-24T12:00:00Z", &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        check("30 2 * * *", berlin, "2026-10-25T00:45:00Z", &["2026-10-26T01:30:00Z"]);
        let hourly = ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-25T02:30:00Z"];
        check("30 * * * *", berlin, "2026-10-25T00:00:00Z", &hourly);
        // Midnight is not there in Beirut on 29 March, and half an hour is repeated on Lord Howe.
        check("@daily", "Asia/Beirut", "2026-03-28T12:00:00Z", &["2026-03-28T22:00:00Z", "2026-03-29T21:00:00Z"]);
        let half = ["2026-04-04T14:45:00Z", "2026-04-04T15:15:00Z", "2026-04-04T16:15:00Z"];
        check("45 * * * *", "Australia/Lord_Howe", "2026-04-04T14:00:00Z", &half);
    }

    #[test]
    fn l2_every_tick_is_later() {
        for (calendar, from) in [("*/7 * * * *", "2026-10-24T20:00:00Z"), ("15,45 1-3 * * *", "2026-03-27T00:00:00Z")] {
            for zone in ["", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "America/Sao_Paulo"] {
                let read = Calendar::read(calendar, zone).unwrap();
                let ticks = read.ticks_after(ms(from), 200);
                assert!(ticks.len() == 200 && ticks.is_sorted_by(|a, b| a < b), "{calendar} {zone}");
            }
        }
        let read = Calendar::read("0 0 * * *", "").unwrap();
        assert_eq!((read.next_after(u64::MAX), read.next_after(ms("2199-12-31T00:00:00Z"))), (None, None));
        assert_eq!(Calendar::read("@every 1s", "").unwrap().next_after(u64::MAX), None);
    }

    #[test]
    fn the_last_of_several() {
        let last = |calendar: &str, zone: &str, from: &str, now: &str, expected: &str| {
            let read = Calendar::read(calendar, zone).unwrap();
            let found = Timestamp::from_millisecond(read.last_until(ms(from), ms(now)) as i64).unwrap();
            assert_eq!(found.to_string(), expected, "{calendar}");
        };
        last("@every 10s", "", "2026-01-01T00:00:03Z", "2026-01-01T00:00:12.9Z", "2026-01-01T00:00:03Z");
        last("@every 10s", "", "2026-01-01T00:00:03Z", "2026-02-01T00:00:13Z", "2026-02-01T00:00:13Z");
        last("* * * * *", "", "2026-01-01T00:00:00Z", "2026-01-01T00:00:59Z", "2026-01-01T00:00:00Z");
        last("* * * * *", "", "2026-01-01T00:00:00Z", "2026-01-01T00:02:00Z", "2026-01-01T00:02:00Z");
        last("* * * * *", "", "2020-01-01T00:00:00Z", "2026-01-01T00:02:10Z", "2026-01-01T00:02:00Z");
        last("0 0 29 2 *", "", "2020-02-29T00:00:00Z", "2031-01-01T00:00:00Z", "2028-02-29T00:00:00Z");
        last("0 0 1 1 *", "", "2026-01-01T00:00:00Z", "2026-12-31T00:00:00Z", "2026-01-01T00:00:00Z");
        last("30 2 * * *", "Europe/Berlin", "2026-03-01T01:30:00Z", "2026-03-29T01:00:10Z", "2026-03-29T01:00:00Z");
    }

    #[test]
    fn l1_what_is_wrong_is_told_with_its_place() {
        let check = |calendar: &str, expected: &str| {
            let wrong = Calendar::read(calendar, "").expect_err(calendar);
            assert_eq!((wrong.field, wrong.why.as_str()), ("calendar", expected), "{calendar}");
        };
        let names = "minute, hour, day of the month, month, day of the week";
        check("* * * *", &format!("`* * * *` has 4 fields where there are 5: {names}"));
        check("0 * * * * *", &format!("`0 * * * * *` has 6 fields where there are 5: {names}"));
        check("", &format!("`` has 0 fields where there are 5: {names}"));
        check("60 * * * *", "field 1, the minute (0 to 59), is `60`: number out of bounds");
        check("0 24 * * *", "field 2, the hour (0 to 23), is `24`: number out of bounds");
        check("0 MON * * *", "field 2, the hour (0 to 23), is `MON`: `MON` is not known here");
        check("0 0 0 * *", "field 3, the day of the month (1 to 31), is `0`: number out of bounds");
        check("0 0 W * *", "field 3, the day of the month (1 to 31), is `W`: invalid day for closest weekday");
        check("0 0 * FOO *", "field 4, the month (1 to 12), is `FOO`: `FOO` is not known here");
        check("0 0 * * 8", "field 5, the day of the week (0 to 7), is `8`: number out of bounds");
        check("0 0 * * +", "field 5, the day of the week (0 to 7), is `+`: there is nothing where a value should be");
        check("1,,2 * * * *", "field 1, the minute (0 to 59), is `1,,2`: there is nothing where a value should be");
        check("10-5 * * * *", "field 1, the minute (0 to 59), is `10-5`: range out of bounds");
        check("*/0 * * * *", "field 1, the minute (0 to 59), is `*/0`: step cannot be zero");
        check("*/90 * * * *", "field 1, the minute (0 to 59), is `*/90`: a step of 90 leaves the field");
        check("0 0 ! * *", "field 3, the day of the month (1 to 31), is `!`: a character does not belong here");
        check("0 0 30 2 *", "`0 0 30 2 *` never comes: no month has such a day");
        check("0 0 31 2,4,6,9,11 *", "`0 0 31 2,4,6,9,11 *` never comes: no month has such a day");
        let known = "@hourly, @daily, @midnight, @weekly, @monthly, @yearly, @annually and @every";
        check("@reboot", &format!("`@reboot` is not known: there are {known}"));
        check("@every", "`@every ` has no length such as 90s, 15m or 1h30m, of whole numbers");
        check("@every 10", "`@every 10` has no length such as 90s, 15m or 1h30m, of whole numbers");
        check("@every 1.5h", "`@every 1.5h` has no length such as 90s, 15m or 1h30m, of whole numbers");
        check("@every 5ä", "`@every 5ä` has no length such as 90s, 15m or 1h30m, of whole numbers");
        check("@every 0s", "`@every 0s` is not between a second and 366 days");
        check("@every 367d", "`@every 367d` is not between a second and 366 days");
        let huge = "@every 99999999999999999d";
        check(huge, "`@every 99999999999999999d` has no length such as 90s, 15m or 1h30m, of whole numbers");
        let zone = Calendar::read("@daily", "Mars/Olympus").unwrap_err();
        assert_eq!(zone.field, "time_zone");
        assert_eq!(zone.why, "`Mars/Olympus` is not the name of a time zone, such as `Europe/Berlin`");
    }
}
