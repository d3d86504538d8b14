//! Places and areas on Earth, and the conditions that they make.

use mongodb::bson::{Bson, Document, doc};

use crate::error::{Error, Result};

/// A place on Earth: longitude and latitude in degrees (WGS 84).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GeoPoint {
    longitude: f64,
    latitude: f64,
}

impl GeoPoint {
    /// A point. **Longitude comes first**, as in GeoJSON, and unlike what people say and most map URLs write.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the longitude is not within −180 to 180 or the latitude not within −90 to 90.
    ///
    /// # Examples
    /// ```
    /// use mongo_core::data::GeoPoint;
    ///
    /// let paris = GeoPoint::new(2.3522, 48.8566)?;
    /// assert_eq!(paris.latitude(), 48.8566);
    /// assert!(GeoPoint::new(-33.87, 151.21).is_err(), "Sydney, the wrong way round");
    /// # Ok::<(), mongo_core::Error>(())
    /// ```
    pub fn new(longitude: f64, latitude: f64) -> Result<Self> {
        if !(-180.0..=180.0).contains(&longitude) {
            return Err(Error::invalid("a longitude must be -180 to 180 degrees").with_context("longitude", longitude));
        }
        if !(-90.0..=90.0).contains(&latitude) {
            return Err(Error::invalid("a latitude must be -90 to 90 degrees: longitude comes first, then latitude")
                .with_context("latitude", latitude));
        }
        Ok(Self { longitude, latitude })
    }

    /// Degrees east of Greenwich.
    pub fn longitude(self) -> f64 {
        self.longitude
    }

    /// Degrees north of the equator.
    pub fn latitude(self) -> f64 {
        self.latitude
    }

    /// The point as GeoJSON, the form to store it in.
    ///
    /// # Examples
    /// ```
    /// use mongo_core::bson::doc;
    /// use mongo_core::data::GeoPoint;
    ///
    /// let point = GeoPoint::new(2.5, 48.5)?.to_geojson();
    /// assert_eq!(point, doc! { "type": "Point", "coordinates": [2.5, 48.5] });
    /// # Ok::<(), mongo_core::Error>(())
    /// ```
    pub fn to_geojson(self) -> Document {
        doc! { "type": "Point", "coordinates": self.coordinates() }
    }

    fn coordinates(self) -> Vec<f64> {
        vec![self.longitude, self.latitude]
    }
}

/// A part of the surface of the Earth.
///
/// ```
/// use mongo_core::data::{GeoArea, GeoPoint};
///
/// let around = GeoArea::circle(GeoPoint::new(2.35, 48.85)?, 500.0)?;
/// let filter = around.filter("location")?; // for find_chunks, count_documents, delete_many …
/// # Ok::<(), mongo_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct GeoArea(Shape);

#[derive(Clone, Debug, PartialEq)]
enum Shape {
    Circle { center: GeoPoint, radius_metres: f64 },
    Box { south_west: GeoPoint, north_east: GeoPoint },
    Polygon(Vec<GeoPoint>),
}

/// The radius that the server itself divides distances by.
const EARTH_RADIUS_METRES: f64 = 6_378_100.0;
/// Longest step along a parallel. A great circle between two points a step apart leaves the parallel by 8 metres at most.
const STEP_DEGREES: f64 = 0.25;
/// Widest box that is sent as one polygon: the server takes a polygon for the smaller of the two areas it bounds.
const SLICE_DEGREES: f64 = 90.0;

impl GeoArea {
    /// All points within `radius_metres` of `center`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the radius is not above 0, or reaches past the far side of the Earth.
    pub fn circle(center: GeoPoint, radius_metres: f64) -> Result<Self> {
        if !(radius_metres > 0.0 && radius_metres < EARTH_RADIUS_METRES * std::f64::consts::PI) {
            return Err(
                Error::invalid("a radius must be above 0 and below 20037000 metres").with_context("radius", radius_metres)
            );
        }
        Ok(Self(Shape::Circle { center, radius_metres }))
    }

    /// All points between two parallels and two meridians, as on a map: from the south-west corner to the north-east.
    ///
    /// A box whose western side is east of its eastern side crosses the 180° meridian. Its northern and southern sides
    /// follow the parallels to within 10 metres (a GeoJSON polygon's own sides are great circles, which leave them
    /// by many kilometres when the box is wide). A point exactly on a side, or a pole that the box reaches, may be in
    /// or out; of boxes that share the side, one has it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when the box has no area, or its south is north of its north.
    pub fn bounding_box(south_west: GeoPoint, north_east: GeoPoint) -> Result<Self> {
        if south_west.latitude >= north_east.latitude {
            return Err(Error::invalid("the south-west corner must be south of the north-east corner"));
        }
        if south_west.longitude == north_east.longitude || spans(south_west, north_east).is_empty() {
            return Err(Error::invalid("the box has no width"));
        }
        Ok(Self(Shape::Box { south_west, north_east }))
    }

    /// The area within a ring of points, whose sides are great circles. The ring need not be closed.
    ///
    /// Of the two areas that a ring bounds on a sphere, the smaller is meant.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when there are fewer than three points, or the same point twice in a row.
    pub fn polygon(points: impl IntoIterator<Item = GeoPoint>) -> Result<Self> {
        let mut ring: Vec<GeoPoint> = points.into_iter().collect();
        if ring.len() > 1 && ring.first() == ring.last() {
            ring.pop();
        }
        if ring.len() < 3 {
            return Err(Error::invalid("a polygon needs at least three different points"));
        }
        if ring.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid("a polygon has the same point twice in a row"));
        }
        Ok(Self(Shape::Polygon(ring)))
    }

    /// The filter that selects documents whose `field` lies wholly within the area.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](crate::ErrorKind::InvalidInput) when `field` is not the name of a field.
    pub fn filter(&self, field: &str) -> Result<Document> {
        check_field(field)?;
        Ok(match &self.0 {
            Shape::Circle { center, radius_metres } => {
                let radians = radius_metres / EARTH_RADIUS_METRES;
                doc! { field: { "$geoWithin": { "$centerSphere": [center.coordinates(), radians] } } }
            }
            Shape::Polygon(ring) => geo_within(field, ring.iter().map(|point| point.coordinates()).collect()),
            Shape::Box { south_west, north_east } => {
                let mut slices: Vec<Document> =
                    slices(*south_west, *north_east).into_iter().map(|ring| geo_within(field, ring)).collect();
                match (slices.len(), slices.pop()) {
                    (1, Some(only)) => only,
                    (_, last) => {
                        slices.extend(last);
                        doc! { "$or": slices }
                    }
                }
            }
        })
    }
}

/// `$geoWithin` a polygon, given as its open ring.
fn geo_within(field: &str, mut ring: Vec<Vec<f64>>) -> Document {
    ring.extend(ring.first().cloned());
    let ring: Vec<Bson> = ring.into_iter().map(Bson::from).collect();
    doc! { field: { "$geoWithin": { "$geometry": { "type": "Polygon", "coordinates": [ring] } } } }
}

/// The box as open rings, none wider than [`SLICE_DEGREES`], none across the 180° meridian.
fn slices(south_west: GeoPoint, north_east: GeoPoint) -> Vec<Vec<Vec<f64>>> {
    let mut rings = Vec::new();
    for (west, east) in spans(south_west, north_east) {
        for cut in steps(west, east, SLICE_DEGREES).windows(2) {
            rings.push(ring(cut[0], cut[1], south_west.latitude, north_east.latitude));
        }
    }
    rings
}

/// The longitudes that the box covers, as intervals that do not cross the 180° meridian.
fn spans(south_west: GeoPoint, north_east: GeoPoint) -> Vec<(f64, f64)> {
    let (west, east) = (south_west.longitude, north_east.longitude);
    let mut spans = if west < east { vec![(west, east)] } else { vec![(west, 180.0), (-180.0, east)] };
    spans.retain(|(west, east)| west < east);
    spans
}

/// One box, counter-clockwise from its south-west corner.
fn ring(west: f64, east: f64, south: f64, north: f64) -> Vec<Vec<f64>> {
    let middle = f64::midpoint(south, north);
    let mut ring = Vec::new();
    // At a pole all longitudes are one point, which may stand in a ring only once.
    if south > -90.0 {
        ring.extend(steps(west, east, STEP_DEGREES).into_iter().map(|longitude| vec![longitude, south]));
    } else {
        ring.push(vec![west, south]);
    }
    // Without a point on the way, a box from pole to pole would have no corners left; meridians are great circles, so it
    // changes nothing otherwise.
    ring.push(vec![east, middle]);
    if north < 90.0 {
        ring.extend(steps(west, east, STEP_DEGREES).into_iter().rev().map(|longitude| vec![longitude, north]));
    } else {
        ring.push(vec![east, north]);
    }
    ring.push(vec![west, middle]);
    ring
}

/// From `from` to `to` in even steps of at most `longest`, both ends included.
fn steps(from: f64, to: f64, longest: f64) -> Vec<f64> {
    let mut count = 1_u32;
    while (to - from) / f64::from(count) > longest {
        count += 1;
    }
    (0..=count).map(|step| if step == count { to } else { from + (to - from) * f64::from(step) / f64::from(count) }).collect()
}

pub(super) fn check_field(field: &str) -> Result<()> {
    if field.is_empty() || field.starts_with('$') || field.contains('\0') {
        return Err(Error::invalid("a field name must not be empty, begin with $ or contain NUL"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn point(longitude: f64, latitude: f64) -> GeoPoint {
        GeoPoint::new(longitude, latitude).unwrap()
    }

    #[test]
    fn coordinates_out_of_range_are_refused_with_a_hint() {
        assert!(GeoPoint::new(181.0, 0.0).is_err());
        assert!(GeoPoint::new(f64::NAN, 0.0).is_err());
        let error = GeoPoint::new(48.8, 151.2).unwrap_err();
        assert!(error.to_string().contains("longitude comes first"), "{error}");
    }

    #[test]
    fn a_ring_may_be_closed_or_open() {
        let open = [point(0.0, 0.0), point(1.0, 0.0), point(1.0, 1.0)];
        let closed = [open[0], open[1], open[2], open[0]];
        assert_eq!(GeoArea::polygon(open).unwrap(), GeoArea::polygon(closed).unwrap());
        assert!(GeoArea::polygon([open[0], open[1], open[0]]).is_err());
        assert!(GeoArea::polygon([open[0], open[0], open[1], open[2]]).is_err());
    }

    #[test]
    fn areas_without_area_are_refused() {
        for radius in [0.0, -1.0, f64::NAN, f64::INFINITY, 3e7] {
            assert!(GeoArea::circle(point(0.0, 0.0), radius).is_err(), "{radius}");
        }
        assert!(GeoArea::bounding_box(point(0.0, 1.0), point(1.0, 0.0)).is_err());
        assert!(GeoArea::bounding_box(point(0.0, 0.0), point(0.0, 1.0)).is_err());
        assert!(GeoArea::bounding_box(point(180.0, 0.0), point(-180.0, 1.0)).is_err());
        assert!(GeoArea::bounding_box(point(180.0, 0.0), point(-179.0, 1.0)).is_ok());
    }

    #[test]
    fn a_box_over_the_date_line_is_cut_there() {
        let area = GeoArea::bounding_box(point(170.0, -10.0), point(-170.0, 10.0)).unwrap();
        assert_eq!(area.filter("at").unwrap().get_array("$or").unwrap().len(), 2);
        let area = GeoArea::bounding_box(point(-180.0, -90.0), point(180.0, 90.0)).unwrap();
        assert_eq!(area.filter("at").unwrap().get_array("$or").unwrap().len(), 4);
        let area = GeoArea::bounding_box(point(1.0, 1.0), point(2.0, 2.0)).unwrap();
        assert!(area.filter("at").unwrap().contains_key("at"));
    }

    #[test]
    fn fields_that_are_operators_are_refused() {
        let area = GeoArea::circle(point(0.0, 0.0), 1.0).unwrap();
        assert!(area.filter("$where").is_err());
        assert!(area.filter("").is_err());
    }

    proptest! {
        /// The server refuses a ring that has a point twice, and takes one of more than a hemisphere inside out.
        #[test]
        fn every_slice_of_a_box_is_a_valid_ring(
            west in -180.0..=180.0_f64,
            east in -180.0..=180.0_f64,
            south in -90.0..89.0_f64,
            height in 0.5..180.0_f64,
        ) {
            let north = (south + height).min(90.0);
            prop_assume!(GeoArea::bounding_box(point(west, south), point(east, north)).is_ok());
            for ring in slices(point(west, south), point(east, north)) {
                prop_assert!(ring.len() >= 4);
                for (position, at) in ring.iter().enumerate() {
                    let same = |other: &Vec<f64>| other == at || (other[1] == at[1] && at[1].abs() == 90.0);
                    prop_assert!(!ring[..position].iter().any(same), "{at:?} twice");
                }
                let (least, most) = ring.iter().fold((180.0_f64, -180.0_f64), |(least, most), at| (least.min(at[0]), most.max(at[0])));
                prop_assert!(most - least <= SLICE_DEGREES + 1e-9);
            }
        }

        #[test]
        fn steps_reach_both_ends_and_are_short(from in -180.0..180.0_f64, width in 0.001..360.0_f64) {
            let to = from + width;
            let points = steps(from, to, STEP_DEGREES);
            prop_assert_eq!(points.first().copied(), Some(from));
            prop_assert_eq!(points.last().copied(), Some(to));
            prop_assert!(points.windows(2).all(|pair| pair[1] > pair[0] && pair[1] - pair[0] <= STEP_DEGREES + 1e-9));
        }
    }
}
