//! Filters and identifiers that come from users.
//!
//! A filter is code: `$where` runs JavaScript on the server, `$expr` and `$function` compute, and `{"$ne": null}` in
//! the place of a password matches every password. So a filter that a user wrote is checked against the operators that a
//! [`FilterPolicy`] allows, at any depth, before it reaches a server:
//!
//! - [`check_filter`] refuses a filter that holds anything else, and names every place. Use it where you can.
//! - [`clean_filter`] takes out what is not allowed and returns a filter that is safe to run.
//!
//! Where a user gives a *value* and not a filter (a name, a password), no operator is welcome at all: put the value
//! through [`literal`], or check it with [`FilterPolicy::no_operators`].
//!
//! # What cleaning does to the meaning
//!
//! A filter without one of its conditions matches *more*, and one without any condition matches everything, which is not
//! what anybody asked for, least of all in a delete. What [`clean_filter`] does about that is the policy's [`Removal`]:
//!
//! | | [`Removal::Narrow`] (default) | [`Removal::Drop`] |
//! |---|---|---|
//! | rule | a condition that is not allowed counts as not fulfilled | a condition that is not allowed is left out |
//! | result | never matches a document that the original would not have matched | may match more than the original |
//! | `{a: 1, $where: …}` | matches nothing | `{a: 1}` |
//! | `{$or: [{a: 1}, {$where: …}]}` | `{$or: [{a: 1}]}` | `{$or: [{a: 1}]}` |
//! | `{$nor: [{a: 1}, {$where: …}]}` | matches nothing | `{$nor: [{a: 1}]}` |
//! | `{$or: [{$where: …}]}`, `{$where: …}`, `{a: {$where: …}}` | matches nothing | matches nothing |
//!
//! Neither ever turns into a filter that matches everything because nothing was left of it: such a filter becomes
//! `{_id: {$in: []}}`, which matches nothing and costs nothing, and [`CleanedFilter::matches_nothing`] says so. Do
//! not hand that one to an upsert: finding nothing is what makes an upsert insert.
//!
//! A filter that limits a user to what is theirs is never merged with the user's own by adding fields, which the user's
//! could override; it goes beside it: `doc! { "$and": [yours, cleaned.filter] }`.

mod clean;
mod policy;

use mongodb::bson::{Bson, Document, doc, oid::ObjectId};

use crate::error::{Error, Result};

pub use clean::{CleanedFilter, ForbiddenOperator, check_filter, clean_filter};
pub use policy::{FilterPolicy, OperatorGroup, Removal};

/// Reads an ObjectId from its 24 hexadecimal digits, upper or lower case.
///
/// # Errors
/// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput); the text itself is not in the error.
///
/// # Examples
/// ```
/// use mongo_core::filter::parse_object_id;
///
/// let id = parse_object_id("507f1f77bcf86cd799439011")?;
/// assert_eq!(id.to_hex(), "507f1f77bcf86cd799439011");
/// assert!(parse_object_id("507f1f77").is_err());
/// # Ok::<(), mongo_core::Error>(())
/// ```
pub fn parse_object_id(text: &str) -> Result<ObjectId> {
    if text.len() != 24 {
        return Err(Error::invalid("an ObjectId has 24 hexadecimal digits").with_context("bytes", text.len()));
    }
    ObjectId::parse_str(text).map_err(|_| Error::invalid("an ObjectId has hexadecimal digits only"))
}

/// Whether `text` is an ObjectId: 24 hexadecimal digits.
///
/// ```
/// use mongo_core::filter::is_object_id;
///
/// assert!(is_object_id("507F1F77BCF86CD799439011"));
/// assert!(!is_object_id("507f1f77bcf86cd79943901z"));
/// ```
pub fn is_object_id(text: &str) -> bool {
    parse_object_id(text).is_ok()
}

/// The condition that a field equals `value` and nothing else, whatever `value` is.
///
/// Inside `$eq` a document is compared as it stands: `{"$ne": null}` from a user is then a document that nobody
/// has stored, and no operator.
///
/// ```
/// use mongo_core::bson::{Bson, doc};
/// use mongo_core::filter::literal;
///
/// let from_user = Bson::Document(doc! { "$ne": null });
/// assert_eq!(doc! { "token": literal(from_user) }, doc! { "token": { "$eq": { "$ne": null } } });
/// ```
pub fn literal(value: impl Into<Bson>) -> Document {
    doc! { "$eq": value.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_ids_are_24_hexadecimal_digits() {
        for text in ["507f1f77bcf86cd799439011", "507F1F77BCF86CD799439011", "000000000000000000000000"] {
            assert!(is_object_id(text), "{text}");
        }
        for text in ["", "507f1f77bcf86cd79943901", "507f1f77bcf86cd7994390111", "507f1f77bcf86cd79943901g", "ääääääääääää"]
        {
            assert!(!is_object_id(text), "{text}");
        }
    }
}
