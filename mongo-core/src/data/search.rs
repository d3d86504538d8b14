//! Text search with scores and geospatial search with distances.

use futures_util::stream::TryStreamExt;
use mongodb::{
    Collection,
    bson::{Document, RawBsonRef, RawDocument, RawDocumentBuf, doc},
};
use serde::de::DeserializeOwned;

use super::{
    area::{GeoArea, GeoPoint, check_field},
    stream::decode,
};
use crate::error::{Error, ErrorKind, Result};

/// How [`text_search`](super::CollectionExt::text_search) searches.
///
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::data::TextSearchSettings;
///
/// let settings = TextSearchSettings::default().with_limit(10).with_filter(doc! { "published": true });
/// assert_eq!(settings.limit, 10);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct TextSearchSettings {
    /// Results at most, at least 1. Default 20.
    pub limit: u32,
    /// Leaves out results with a lower score. Default: none.
    pub min_score: Option<f64>,
    /// Language of the query, by its name or ISO code; `none` for no stemming. Default: that of the index.
    pub language: Option<String>,
    /// Whether upper and lower case differ. Default false.
    pub case_sensitive: bool,
    /// Whether letters with and without diacritics differ. Default false.
    pub diacritic_sensitive: bool,
    /// A further condition. Default: none.
    pub filter: Document,
}

impl Default for TextSearchSettings {
    fn default() -> Self {
        Self {
            limit: 20,
            min_score: None,
            language: None,
            case_sensitive: false,
            diacritic_sensitive: false,
            filter: Document::new(),
        }
    }
}

impl TextSearchSettings {
    /// Sets how many results are returned at most.
    #[must_use]
    pub fn with_limit(mut self, limit: u32) -> Self {
        self.limit = limit;
        self
    }

    /// Leaves out results with a lower score.
    #[must_use]
    pub fn with_min_score(mut self, score: f64) -> Self {
        self.min_score = Some(score);
        self
    }

    /// Sets the language of the query.
    #[must_use]
    pub fn with_language(mut self, language: impl Into<String>) -> Self {
        self.language = Some(language.into());
        self
    }

    /// Distinguishes upper and lower case.
    #[must_use]
    pub fn case_sensitive(mut self) -> Self {
        self.case_sensitive = true;
        self
    }

    /// Distinguishes letters with and without diacritics.
    #[must_use]
    pub fn diacritic_sensitive(mut self) -> Self {
        self.diacritic_sensitive = true;
        self
    }

    /// Sets a further condition.
    #[must_use]
    pub fn with_filter(mut self, filter: Document) -> Self {
        self.filter = filter;
        self
    }
}

/// A result of a text search.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Scored<T> {
    /// The document as it is stored.
    pub document: T,
    /// How well it matches, from 0 up; comparable within one search only.
    pub score: f64,
}

/// How [`near`](super::CollectionExt::near) searches.
///
/// ```
/// use mongo_core::data::NearSettings;
///
/// let ring = NearSettings::default().with_min_distance_metres(100.0).with_max_distance_metres(500.0);
/// assert_eq!(ring.max_distance_metres, Some(500.0));
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct NearSettings {
    /// Results at most, at least 1. Default 100.
    pub limit: u32,
    /// Leaves out what is nearer. Default: nothing.
    pub min_distance_metres: Option<f64>,
    /// Leaves out what is farther. Default: nothing.
    pub max_distance_metres: Option<f64>,
    /// A further condition. Default: none.
    pub filter: Document,
}

impl Default for NearSettings {
    fn default() -> Self {
        Self { limit: 100, min_distance_metres: None, max_distance_metres: None, filter: Document::new() }
    }
}

impl NearSettings {
    /// Sets how many results are returned at most.
    #[must_use]
    pub fn with_limit(mut self, limit: u32) -> Self {
        self.limit = limit;
        self
    }

    /// Leaves out what is nearer.
    #[must_use]
    pub fn with_min_distance_metres(mut self, metres: f64) -> Self {
        self.min_distance_metres = Some(metres);
        self
    }

    /// Leaves out what is farther.
    #[must_use]
    pub fn with_max_distance_metres(mut self, metres: f64) -> Self {
        self.max_distance_metres = Some(metres);
        self
    }

    /// Sets a further condition.
    #[must_use]
    pub fn with_filter(mut self, filter: Document) -> Self {
        self.filter = filter;
        self
    }

    fn validate(&self) -> Result<()> {
        positive(self.limit)?;
        let (min, max) = (self.min_distance_metres, self.max_distance_metres);
        if [min, max].into_iter().flatten().any(|metres| !metres.is_finite() || metres < 0.0) {
            return Err(Error::invalid("a distance must be a finite number of metres, 0 or more"));
        }
        match (min, max) {
            (Some(min), Some(max)) if min > max => Err(Error::invalid("the minimum distance is above the maximum")),
            _ => Ok(()),
        }
    }
}

/// A result of a search for what is near.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Nearby<T> {
    /// The document as it is stored.
    pub document: T,
    /// Distance over the surface of a sphere, in metres.
    pub distance_metres: f64,
}

/// How [`within`](super::CollectionExt::within) searches.
///
/// ```
/// use mongo_core::bson::doc;
/// use mongo_core::data::WithinSettings;
///
/// let settings = WithinSettings::default().with_filter(doc! { "open": true });
/// assert_eq!(settings.limit, 1_000);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
#[non_exhaustive]
pub struct WithinSettings {
    /// Results at most, at least 1. Default 1,000.
    pub limit: u32,
    /// A further condition. Default: none.
    pub filter: Document,
}

impl Default for WithinSettings {
    fn default() -> Self {
        Self { limit: 1_000, filter: Document::new() }
    }
}

impl WithinSettings {
    /// Sets how many results are returned at most.
    #[must_use]
    pub fn with_limit(mut self, limit: u32) -> Self {
        self.limit = limit;
        self
    }

    /// Sets a further condition.
    #[must_use]
    pub fn with_filter(mut self, filter: Document) -> Self {
        self.filter = filter;
        self
    }
}

pub(super) async fn text<T: DeserializeOwned + Send>(
    collection: &Collection<RawDocumentBuf>,
    query: &str,
    settings: TextSearchSettings,
) -> Result<Vec<Scored<T>>> {
    positive(settings.limit)?;
    if query.trim().is_empty() {
        return Err(Error::invalid("a text search needs at least one word"));
    }
    let mut search = doc! {
        "$search": query,
        "$caseSensitive": settings.case_sensitive,
        "$diacriticSensitive": settings.diacritic_sensitive,
    };
    if let Some(language) = settings.language {
        search.insert("$language", language);
    }
    let score = doc! { "$meta": "textScore" };
    let pipeline = [
        doc! { "$match": both(doc! { "$text": search }, settings.filter) },
        doc! { "$sort": { "score": score.clone(), "_id": 1 } },
        doc! { "$limit": i64::from(settings.limit) },
        doc! { "$project": { "_id": 0, "document": "$$ROOT", "score": score } },
    ];
    let mut found: Vec<Scored<T>> = run(collection, pipeline, |document, score| Scored { document, score }, "score")
        .await
        .map_err(|error| needs_index(error, "a text search needs a text index on the collection"))?;
    if let Some(least) = settings.min_score {
        found.retain(|result| result.score >= least);
    }
    Ok(found)
}

pub(super) async fn near<T: DeserializeOwned + Send>(
    collection: &Collection<RawDocumentBuf>,
    field: &str,
    point: GeoPoint,
    settings: NearSettings,
) -> Result<Vec<Nearby<T>>> {
    check_field(field)?;
    settings.validate()?;
    // `$geoNear` writes the distance into the document; it is taken out again before the document is handed over.
    const DISTANCE: &str = "__mongo_core_distance";
    let mut stage = doc! {
        "near": point.to_geojson(),
        "key": field,
        "distanceField": DISTANCE,
        "spherical": true,
        "query": settings.filter,
    };
    if let Some(metres) = settings.min_distance_metres {
        stage.insert("minDistance", metres);
    }
    if let Some(metres) = settings.max_distance_metres {
        stage.insert("maxDistance", metres);
    }
    let pipeline = [
        doc! { "$geoNear": stage },
        doc! { "$limit": i64::from(settings.limit) },
        doc! { "$project": { "_id": 0, "document": "$$ROOT", "distance": format!("${DISTANCE}") } },
        doc! { "$unset": format!("document.{DISTANCE}") },
    ];
    run(collection, pipeline, |document, distance_metres| Nearby { document, distance_metres }, "distance")
        .await
        .map_err(|error| needs_index(error, "a near search needs a 2dsphere index on the field").with_context("field", field))
}

pub(super) async fn within<T: DeserializeOwned + Send>(
    collection: &Collection<RawDocumentBuf>,
    field: &str,
    area: &GeoArea,
    settings: WithinSettings,
) -> Result<Vec<T>> {
    positive(settings.limit)?;
    let filter = both(area.filter(field)?, settings.filter);
    let mut cursor = collection.find(filter).limit(i64::from(settings.limit)).await?;
    let mut found = Vec::new();
    while let Some(document) = cursor.try_next().await? {
        found.push(decode(&document)?);
    }
    Ok(found)
}

/// Runs a pipeline whose results are `{ document, <number> }`.
async fn run<T: DeserializeOwned + Send, R: Send>(
    collection: &Collection<RawDocumentBuf>,
    pipeline: [Document; 4],
    result: fn(T, f64) -> R,
    number: &str,
) -> Result<Vec<R>> {
    let mut cursor = collection.aggregate(pipeline).with_type::<RawDocumentBuf>().await?;
    let mut found = Vec::new();
    while let Some(envelope) = cursor.try_next().await? {
        let document = envelope.get_document("document").map_err(|_| malformed())?;
        let number = double(&envelope, number).ok_or_else(malformed)?;
        found.push(result(decode(document)?, number));
    }
    Ok(found)
}

fn double(document: &RawDocument, name: &str) -> Option<f64> {
    match document.get(name).ok()?? {
        RawBsonRef::Double(number) => Some(number),
        RawBsonRef::Int32(number) => Some(f64::from(number)),
        _ => None,
    }
}

fn malformed() -> Error {
    Error::corrupt("the server's reply to a search is malformed")
}

/// Both conditions, whatever operators and fields they name.
fn both(first: Document, second: Document) -> Document {
    if second.is_empty() {
        first
    } else {
        doc! { "$and": [first, second] }
    }
}

/// Makes "there is no such index" say what to do.
fn needs_index(error: Error, cure: &'static str) -> Error {
    match error.server_code() {
        // NamespaceNotFound, IndexNotFound, NoQueryExecutionPlans.
        Some(26 | 27 | 291) => Error::new(ErrorKind::NotFound, cure).with_source(error),
        _ => error,
    }
}

fn positive(limit: u32) -> Result<()> {
    if limit == 0 { Err(Error::invalid("a limit must be at least 1")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_must_make_sense() {
        assert!(NearSettings::default().with_min_distance_metres(2.0).with_max_distance_metres(1.0).validate().is_err());
        assert!(NearSettings::default().with_max_distance_metres(-1.0).validate().is_err());
        assert!(NearSettings::default().with_limit(0).validate().is_err());
    }
}
