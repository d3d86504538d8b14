//! The order of `_id`s in an index: the server's comparison of BSON values, without a collation.
//!
//! Source: `BSONElement::compareElements` and `canonicalizeBSONType` of the server. Numbers of all types are compared by their exact
//! value, strings and symbols by their bytes.

use std::{
    cmp::Ordering,
    hash::{DefaultHasher, Hasher as _},
};

use mongodb::bson::{Decimal128, RawBinaryRef, RawBsonRef, RawDocument, spec::BinarySubtype};

use super::{
    partition::Key,
    raw::{self, Element},
};
use crate::error::Result;

impl Key {
    /// Where this key stands to another in the `_id` index of a collection without a collation.
    ///
    /// Keys that compare equal need not be the same: `1` and `1.0` have one place in an index.
    pub fn compare(&self, other: &Self) -> Ordering {
        if let Some(order) = alike(self.element(), other.element()) {
            return order;
        }
        let value = |key: &Self| key.as_document().get("_id").ok().flatten().is_some();
        match (value(self), value(other)) {
            (true, true) => match (self.as_document().get("_id"), other.as_document().get("_id")) {
                (Ok(Some(a)), Ok(Some(b))) => compare(a, b),
                _ => Ordering::Equal,
            },
            // What cannot be read has no place; the first is as good as any.
            (a, b) => a.cmp(&b),
        }
    }
}

/// Where the `_id` of one document stands to that of another, as [`Key::compare`] says it.
///
/// # Errors
/// `CorruptData` for a document that has no `_id`.
pub(super) fn compare_ids(a: &RawDocument, b: &RawDocument) -> Result<Ordering> {
    match alike(Some(raw::id_of(a)?), Some(raw::id_of(b)?)) {
        Some(order) => Ok(order),
        None => Ok(Key::of(a)?.compare(&Key::of(b)?)),
    }
}

/// The order of two values of one of the types that most `_id`s are of.
fn alike(a: Option<Element<'_>>, b: Option<Element<'_>>) -> Option<Ordering> {
    let (a, b) = (a?, b?);
    match (a.kind, b.kind) {
        (raw::INT32 | raw::INT64, raw::INT32 | raw::INT64) => Some(a.as_integer()?.cmp(&b.as_integer()?)),
        (raw::OBJECT_ID, raw::OBJECT_ID) => Some(a.value.cmp(b.value)),
        _ => None,
    }
}

fn compare(a: RawBsonRef<'_>, b: RawBsonRef<'_>) -> Ordering {
    rank(&a).cmp(&rank(&b)).then_with(|| same_rank(a, b))
}

/// A hash of a value's place in an index: values that compare equal, whatever their types, have the same.
pub(super) fn place_hash(value: &Element<'_>) -> u64 {
    let mut hasher = DefaultHasher::new();
    hash_place(value, 0, &mut hasher);
    hasher.finish()
}

/// The same for numbers that are equal, whatever their types: they are nearest to the same double.
fn place_of_number(value: &Element<'_>) -> u64 {
    let number = match value.kind {
        raw::DOUBLE => value.value.first_chunk().map(|bytes| f64::from_le_bytes(*bytes)),
        raw::DECIMAL => value.value.first_chunk().and_then(|bytes| Decimal128::from_bytes(*bytes).to_string().parse().ok()),
        _ => value.as_integer().map(|number| number as f64),
    };
    match number.unwrap_or(f64::NAN) {
        number if number.is_nan() => u64::MAX,
        0.0 => 0,
        number => number.to_bits(),
    }
}

/// The exact value of a number: the same bytes for numbers that are equal, whatever their types, and for no others.
pub(crate) fn exact_number(value: &Element<'_>) -> Vec<u8> {
    let alone = value.alone_as("n").ok();
    let number = alone.as_ref().and_then(|alone| alone.get("n").ok().flatten());
    match number {
        Some(number) if approximate(&number).is_some_and(f64::is_nan) => b"NaN".to_vec(),
        Some(number) => {
            let Exact { negative, infinite, digits, exponent } = exact(&number);
            // There are two zeros, and they are equal.
            let negative = negative && (infinite || !digits.is_empty());
            let exponent = if digits.is_empty() { 0 } else { exponent };
            [&[u8::from(negative), u8::from(infinite)], &exponent.to_le_bytes()[..], &digits].concat()
        }
        None => value.value.to_vec(),
    }
}

fn hash_place(value: &Element<'_>, depth: u32, hasher: &mut DefaultHasher) {
    match value.kind {
        raw::DOUBLE | raw::INT32 | raw::INT64 | raw::DECIMAL => {
            hasher.write_u8(raw::DOUBLE);
            hasher.write_u64(place_of_number(value));
        }
        // Deeper values are too rare to be worth telling apart.
        raw::DOCUMENT | raw::ARRAY if depth >= 4 => hasher.write_u8(value.kind),
        raw::DOCUMENT | raw::ARRAY => {
            hasher.write_u8(value.kind);
            let fields = value.as_document().or_else(|| value.as_array());
            for field in fields.into_iter().flat_map(raw::elements).flatten() {
                hasher.write(field.name);
                hash_place(&field, depth + 1, hasher);
            }
        }
        raw::SYMBOL => {
            hasher.write_u8(raw::STRING);
            hasher.write(value.value);
        }
        kind => {
            hasher.write_u8(kind);
            hasher.write(value.value);
        }
    }
}

/// Where the types stand to each other.
fn rank(value: &RawBsonRef<'_>) -> u8 {
    match value {
        RawBsonRef::MinKey => 0,
        RawBsonRef::Undefined => 1,
        RawBsonRef::Null => 5,
        RawBsonRef::Double(_) | RawBsonRef::Int32(_) | RawBsonRef::Int64(_) | RawBsonRef::Decimal128(_) => 10,
        RawBsonRef::String(_) | RawBsonRef::Symbol(_) => 15,
        RawBsonRef::Document(_) => 20,
        RawBsonRef::Array(_) => 25,
        RawBsonRef::Binary(_) => 30,
        RawBsonRef::ObjectId(_) => 35,
        RawBsonRef::Boolean(_) => 40,
        RawBsonRef::DateTime(_) => 45,
        RawBsonRef::Timestamp(_) => 47,
        RawBsonRef::RegularExpression(_) => 50,
        RawBsonRef::DbPointer(_) => 55,
        RawBsonRef::JavaScriptCode(_) => 60,
        RawBsonRef::JavaScriptCodeWithScope(_) => 65,
        RawBsonRef::MaxKey => 127,
    }
}

fn same_rank(a: RawBsonRef<'_>, b: RawBsonRef<'_>) -> Ordering {
    use RawBsonRef as V;
    match (a, b) {
        (V::String(a) | V::Symbol(a), V::String(b) | V::Symbol(b)) => a.as_bytes().cmp(b.as_bytes()),
        (V::JavaScriptCode(a), V::JavaScriptCode(b)) => a.as_bytes().cmp(b.as_bytes()),
        (V::Document(a), V::Document(b)) => documents(a, b),
        (V::Array(a), V::Array(b)) => {
            let (mut a, mut b) = (a.into_iter(), b.into_iter());
            loop {
                match (a.next(), b.next()) {
                    (Some(Ok(a)), Some(Ok(b))) => match compare(a, b) {
                        Ordering::Equal => {}
                        different => return different,
                    },
                    (a, b) => return a.is_some().cmp(&b.is_some()),
                }
            }
        }
        (V::Binary(a), V::Binary(b)) => (stored_length(&a).cmp(&stored_length(&b)))
            .then_with(|| u8::from(a.subtype).cmp(&u8::from(b.subtype)))
            .then_with(|| a.bytes.cmp(b.bytes)),
        (V::ObjectId(a), V::ObjectId(b)) => a.bytes().cmp(&b.bytes()),
        (V::Boolean(a), V::Boolean(b)) => a.cmp(&b),
        (V::DateTime(a), V::DateTime(b)) => a.timestamp_millis().cmp(&b.timestamp_millis()),
        (V::Timestamp(a), V::Timestamp(b)) => (a.time, a.increment).cmp(&(b.time, b.increment)),
        (V::RegularExpression(a), V::RegularExpression(b)) => {
            a.pattern.as_str().cmp(b.pattern.as_str()).then_with(|| a.options.as_str().cmp(b.options.as_str()))
        }
        (V::JavaScriptCodeWithScope(a), V::JavaScriptCodeWithScope(b)) => {
            a.code.as_bytes().cmp(b.code.as_bytes()).then_with(|| documents(a.scope, b.scope))
        }
        (a, b) => numbers(&a, &b),
    }
}

/// The old subtype holds its length once more, and the server counts it.
fn stored_length(binary: &RawBinaryRef<'_>) -> usize {
    binary.bytes.len() + if binary.subtype == BinarySubtype::BinaryOld { 4 } else { 0 }
}

fn documents(a: &RawDocument, b: &RawDocument) -> Ordering {
    let (mut a, mut b) = (a.iter(), b.iter());
    loop {
        match (a.next(), b.next()) {
            (Some(Ok((a_name, a))), Some(Ok((b_name, b)))) => {
                let order = rank(&a)
                    .cmp(&rank(&b))
                    .then_with(|| a_name.as_str().as_bytes().cmp(b_name.as_str().as_bytes()))
                    .then_with(|| same_rank(a, b));
                if order != Ordering::Equal {
                    return order;
                }
            }
            (a, b) => return a.is_some().cmp(&b.is_some()),
        }
    }
}

/// NaN is the smallest number and equal to itself, whatever its type.
fn numbers(a: &RawBsonRef<'_>, b: &RawBsonRef<'_>) -> Ordering {
    if let (Some(a), Some(b)) = (integer(a), integer(b)) {
        return a.cmp(&b);
    }
    match (approximate(a), approximate(b)) {
        (Some(x), Some(y)) if x.is_nan() || y.is_nan() => y.is_nan().cmp(&x.is_nan()),
        (Some(x), Some(y)) => match x.partial_cmp(&y) {
            // The same number as far as a double can tell, or beyond all doubles.
            Some(Ordering::Equal) => exact(a).compare(&exact(b)),
            different => different.unwrap_or(Ordering::Equal),
        },
        _ => Ordering::Equal,
    }
}

fn integer(value: &RawBsonRef<'_>) -> Option<i64> {
    match value {
        RawBsonRef::Int32(value) => Some(i64::from(*value)),
        RawBsonRef::Int64(value) => Some(*value),
        _ => None,
    }
}

/// The double that is nearest.
fn approximate(value: &RawBsonRef<'_>) -> Option<f64> {
    match value {
        RawBsonRef::Int32(value) => Some(f64::from(*value)),
        // Rounds to the nearest double, which is what is wanted.
        RawBsonRef::Int64(value) => Some(*value as f64),
        RawBsonRef::Double(value) => Some(*value),
        RawBsonRef::Decimal128(value) => value.to_string().parse().ok(),
        _ => None,
    }
}

/// A number as decimal digits: `0.d₁d₂… · 10^exponent`, without leading or trailing zeros.
#[derive(Debug, PartialEq)]
struct Exact {
    negative: bool,
    infinite: bool,
    digits: Vec<u8>,
    exponent: i64,
}

fn exact(value: &RawBsonRef<'_>) -> Exact {
    let text = match value {
        RawBsonRef::Int32(value) => value.to_string(),
        RawBsonRef::Int64(value) => value.to_string(),
        // Every double has at most 767 significant decimal digits.
        RawBsonRef::Double(value) => format!("{value:.780e}"),
        RawBsonRef::Decimal128(value) => value.to_string(),
        _ => String::new(),
    };
    let (negative, text) = text.strip_prefix('-').map_or((false, &*text), |rest| (true, rest));
    let text = text.to_ascii_lowercase();
    if text.starts_with("inf") {
        return Exact { negative, infinite: true, digits: Vec::new(), exponent: 0 };
    }
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i64 = exponent.trim_start_matches('+').parse().unwrap_or(0);
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all: Vec<u8> = whole.bytes().chain(fraction.bytes()).collect();
    let leading = all.iter().take_while(|digit| **digit == b'0').count();
    let mut digits = all[leading..].to_vec();
    while digits.last() == Some(&b'0') {
        digits.pop();
    }
    let place = i64::try_from(whole.len()).unwrap_or(0) - i64::try_from(leading).unwrap_or(0) + exponent;
    Exact {
        negative: negative && !digits.is_empty(),
        infinite: false,
        exponent: if digits.is_empty() { 0 } else { place },
        digits,
    }
}

impl Exact {
    fn compare(&self, other: &Self) -> Ordering {
        let zero = |number: &Self| number.digits.is_empty() && !number.infinite;
        match (zero(self), zero(other)) {
            (true, true) => return Ordering::Equal,
            (true, false) => return if other.negative { Ordering::Greater } else { Ordering::Less },
            (false, true) => return if self.negative { Ordering::Less } else { Ordering::Greater },
            (false, false) => {}
        }
        if self.negative != other.negative {
            return other.negative.cmp(&self.negative);
        }
        let size = self
            .infinite
            .cmp(&other.infinite)
            .then_with(|| self.exponent.cmp(&other.exponent))
            .then_with(|| self.digits.cmp(&other.digits));
        if self.negative { size.reverse() } else { size }
    }
}

#[cfg(test)]
mod tests {
    use mongodb::bson::{Bson, Decimal128, RawBson};
    use proptest::prelude::*;

    use super::*;

    fn key(value: impl Into<Bson>) -> Key {
        Key::from(RawBson::try_from(value.into()).unwrap())
    }

    fn decimal(text: &str) -> Bson {
        Bson::Decimal128(text.parse::<Decimal128>().unwrap())
    }

    #[test]
    fn numbers_compare_by_their_exact_value() {
        let ascending: Vec<Bson> = vec![
            f64::NAN.into(),
            f64::NEG_INFINITY.into(),
            decimal("-1E+400"),
            i64::MIN.into(),
            (-1.5).into(),
            0.into(),
            decimal("0.1"),
            // The double is a little more than a tenth.
            0.1.into(),
            1.into(),
            9_007_199_254_740_992.0.into(),
            9_007_199_254_740_993_i64.into(),
            decimal("9007199254740993.5"),
            i64::MAX.into(),
            9_223_372_036_854_775_808.0.into(),
            decimal("1E+400"),
            f64::INFINITY.into(),
        ];
        for (position, a) in ascending.iter().enumerate() {
            for (other, b) in ascending.iter().enumerate() {
                assert_eq!(key(a.clone()).compare(&key(b.clone())), position.cmp(&other), "{a} and {b}");
            }
        }
        let equal: [(Bson, Bson); 4] =
            [(1.into(), 1.0.into()), (decimal("1.50"), 1.5.into()), (0.into(), (-0.0).into()), (decimal("NaN"), f64::NAN.into())];
        for (a, b) in equal {
            assert_eq!(key(a).compare(&key(b)), Ordering::Equal);
        }
    }

    proptest! {
        #[test]
        fn the_order_of_doubles_and_integers_is_total(a: f64, b: f64, c: i64) {
            let (x, y, z) = (key(a), key(b), key(c));
            prop_assert_eq!(x.compare(&y), y.compare(&x).reverse());
            prop_assert_eq!(x.compare(&z), z.compare(&x).reverse());
            if x.compare(&y).is_le() && y.compare(&z).is_le() {
                prop_assert!(x.compare(&z).is_le());
            }
        }
    }
}
