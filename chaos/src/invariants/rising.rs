//! What was known by a moment: the highest of all numbers that came before it, or the lowest of all that came after.
//! Must never count what happened at the very moment that is asked for.

use crate::oracle::Moment;

/// Numbers with their moments, to be asked for the highest before any moment.
#[derive(Debug, Default)]
pub(super) struct Rising(Vec<(Moment, u64)>);

impl FromIterator<(Moment, u64)> for Rising {
    fn from_iter<T: IntoIterator<Item = (Moment, u64)>>(points: T) -> Self {
        let mut points: Vec<_> = points.into_iter().collect();
        points.sort_unstable();
        let mut highest = 0;
        for (_, number) in &mut points {
            highest = highest.max(*number);
            *number = highest;
        }
        Self(points)
    }
}

impl Rising {
    /// The highest number from before this moment; 0 if there is none.
    pub(super) fn before(&self, moment: Moment) -> u64 {
        let earlier = self.0.partition_point(|(at, _)| *at < moment);
        earlier.checked_sub(1).map_or(0, |last| self.0[last].1)
    }
}

/// Numbers with their moments, to be asked for the lowest after any moment.
#[derive(Debug, Default)]
pub(super) struct Falling(Vec<(Moment, u64)>);

impl FromIterator<(Moment, u64)> for Falling {
    fn from_iter<T: IntoIterator<Item = (Moment, u64)>>(points: T) -> Self {
        let mut points: Vec<_> = points.into_iter().collect();
        points.sort_unstable();
        let mut lowest = u64::MAX;
        for (_, number) in points.iter_mut().rev() {
            lowest = lowest.min(*number);
            *number = lowest;
        }
        Self(points)
    }
}

impl Falling {
    /// The lowest number from after this moment; the greatest there is if there is none.
    pub(super) fn after(&self, moment: Moment) -> u64 {
        let upto = self.0.partition_point(|(at, _)| *at <= moment);
        self.0.get(upto).map_or(u64::MAX, |(_, number)| *number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_strictly_before_or_after_counts() {
        let points = [(Moment(5), 9), (Moment(2), 3), (Moment(8), 4)];
        let rising: Rising = points.into_iter().collect();
        assert_eq!([2, 3, 5, 6, 9].map(|at| rising.before(Moment(at))), [0, 3, 3, 9, 9]);
        let falling: Falling = points.into_iter().collect();
        assert_eq!([1, 2, 5, 7, 8].map(|at| falling.after(Moment(at))), [3, 4, 4, 4, u64::MAX]);
    }
}
