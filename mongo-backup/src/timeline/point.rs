//! A point in time that is to be restored.

use std::{fmt, str::FromStr};

use mongo_core::{
    Error, Result,
    bson::{DateTime, Timestamp},
};
use serde::{Deserialize, Serialize};

/// A second, or a position in the oplog.
///
/// ```
/// use mongo_backup::RestorePoint;
///
/// let second: RestorePoint = "2026-02-28T14:03:26Z".parse()?;
/// assert_eq!(second, RestorePoint::Second(1_772_287_406));
/// assert_eq!("1772287406".parse::<RestorePoint>()?, second);
/// let position: RestorePoint = "1772287406:3".parse()?;
/// assert_eq!(position.to_string(), "1772287406:3");
/// # Ok::<_, mongo_backup::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum RestorePoint {
    /// The end of a second since 1970 UTC, by the clock of the source: all that happened in it has happened, as far as it was captured. The report tells the
    /// position that was reached.
    Second(u32),
    /// Right behind the operation at this position, as `operationTime` tells it.
    Position(Timestamp),
}

impl RestorePoint {
    /// The last position that belongs to it.
    pub(crate) fn limit(self) -> Timestamp {
        match self {
            Self::Second(time) => Timestamp { time, increment: u32::MAX },
            Self::Position(at) => at,
        }
    }

    /// Whether it is reached by what was captured up to a position. Of a second all counts that was captured of it.
    pub(crate) fn is_reached_by(self, end: Timestamp) -> bool {
        match self {
            Self::Second(time) => end.time >= time,
            Self::Position(at) => end >= at,
        }
    }
}

impl fmt::Display for RestorePoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Second(time) => {
                let at = DateTime::from_millis(i64::from(*time) * 1000);
                f.write_str(&at.try_to_rfc3339_string().unwrap_or_default())
            }
            Self::Position(at) => write!(f, "{}:{}", at.time, at.increment),
        }
    }
}

impl FromStr for RestorePoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(
                "a point in time is a second, as 2026-02-28T14:03:26Z or 1772287406, or a position in the oplog, as 1772287406:3",
            )
            .with_context("got", text.escape_debug())
        };
        if let Some((time, increment)) = text.split_once(':').filter(|(time, _)| time.bytes().all(|byte| byte.is_ascii_digit())) {
            let number = |text: &str| text.parse().map_err(|_| wrong());
            return Ok(Self::Position(Timestamp { time: number(time)?, increment: number(increment)? }));
        }
        if let Ok(time) = text.parse() {
            return Ok(Self::Second(time));
        }
        let at = DateTime::parse_rfc3339_str(text).map_err(|_| wrong())?.timestamp_millis();
        if at % 1000 != 0 {
            return Err(Error::invalid("the oplog knows whole seconds: name one, or a position in it, as 1772287406:3")
                .with_context("got", text));
        }
        u32::try_from(at / 1000).map(Self::Second).map_err(|_| wrong())
    }
}

impl TryFrom<String> for RestorePoint {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<RestorePoint> for String {
    fn from(point: RestorePoint) -> Self {
        point.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_in_every_form() {
        assert_eq!("5:7".parse::<RestorePoint>().unwrap(), RestorePoint::Position(Timestamp { time: 5, increment: 7 }));
        assert_eq!("1970-01-01T01:00:05+01:00".parse::<RestorePoint>().unwrap(), RestorePoint::Second(5));
        for bad in ["", "5:", ":7", "yesterday", "5:7:9", "-5", "2026-02-28T14:03:26.500Z", "2026-02-28"] {
            assert!(bad.parse::<RestorePoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_second_ends_with_its_last_operation() {
        let at = |time, increment| Timestamp { time, increment };
        assert!(RestorePoint::Second(5).limit() >= at(5, 1000) && RestorePoint::Second(5).limit() < at(6, 0));
        assert!(RestorePoint::Second(5).is_reached_by(at(5, 1)) && !RestorePoint::Second(5).is_reached_by(at(4, 9)));
        assert!(!RestorePoint::Position(at(5, 2)).is_reached_by(at(5, 1)));
    }
}
