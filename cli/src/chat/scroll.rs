//! Which lines of a conversation are in view. Must never lose the place: whatever comes before or after it, the line at
//! the top stays there until somebody moves.

use ratatui::text::Line;

use super::{conversation::Place, lines::Paper};

/// A line: of which block, and which of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spot {
    block: usize,
    line: usize,
}

/// A view of so many lines.
pub(crate) struct View<'a> {
    pub(crate) paper: &'a Paper<'a>,
    pub(crate) height: usize,
}

impl View<'_> {
    /// The lines in view, from the top; fewer than the height if there are not more.
    pub(crate) fn lines(&self, place: Place) -> Vec<Line<'static>> {
        let Some(top) = self.top(place) else { return Vec::new() };
        let mut lines = Vec::new();
        for block in top.block..self.paper.len() {
            let skip = if block == top.block { top.line } else { 0 };
            lines.extend(self.paper.block(block).into_iter().skip(skip));
            if lines.len() >= self.height {
                lines.truncate(self.height);
                break;
            }
        }
        lines
    }

    /// So many lines up.
    pub(crate) fn up(&self, place: Place, lines: usize) -> Place {
        let Some(top) = self.top(place) else { return Place::End };
        self.place(self.back(top, lines))
    }

    /// So many lines down; what reaches the end stays there.
    pub(crate) fn down(&self, place: Place, lines: usize) -> Place {
        let Some(mut top) = self.top(place) else { return Place::End };
        let mut left = lines;
        loop {
            let rest = self.paper.block(top.block).len() - top.line;
            if left < rest {
                top.line += left;
                return self.place(top);
            }
            if top.block + 1 == self.paper.len() {
                return Place::End;
            }
            left -= rest;
            top = Spot { block: top.block + 1, line: 0 };
        }
    }

    /// Whether less than a view's height stands above it.
    pub(crate) fn is_near_begin(&self, place: Place) -> bool {
        match self.top(place) {
            Some(top) => self.lines_above(top, self.height) < self.height,
            None => true,
        }
    }

    /// Whether less than a view's height stands below it.
    pub(crate) fn is_near_end(&self, place: Place) -> bool {
        let Some(top) = self.top(place) else { return true };
        self.lines_from(top, 2 * self.height) < 2 * self.height
    }

    /// Lines below the view, at most `most`.
    pub(crate) fn below(&self, place: Place, most: usize) -> usize {
        self.top(place).map_or(0, |top| self.lines_from(top, self.height + most).saturating_sub(self.height))
    }

    fn top(&self, place: Place) -> Option<Spot> {
        let last = self.paper.len().checked_sub(1)?;
        match place {
            Place::End => {
                let end = Spot { block: last, line: self.paper.block(last).len() };
                Some(self.back(end, self.height))
            }
            Place::At { row, rest } => {
                let block = self.paper.index(row)?;
                let lines = self.paper.block(block).len();
                // Less may stand above a row than did, and what it says may take fewer lines.
                Some(self.back(Spot { block, line: lines.saturating_sub(rest) }, rest.saturating_sub(lines)))
            }
        }
    }

    fn place(&self, top: Spot) -> Place {
        if self.lines_from(top, self.height + 1) <= self.height {
            return Place::End;
        }
        Place::At { row: self.paper.key(top.block), rest: self.paper.block(top.block).len() - top.line }
    }

    fn back(&self, from: Spot, lines: usize) -> Spot {
        let (mut spot, mut left) = (from, lines);
        while left > spot.line && spot.block > 0 {
            left -= spot.line;
            spot = Spot { block: spot.block - 1, line: self.paper.block(spot.block - 1).len() };
        }
        Spot { line: spot.line.saturating_sub(left), ..spot }
    }

    fn lines_above(&self, spot: Spot, enough: usize) -> usize {
        let mut lines = spot.line;
        for block in (0..spot.block).rev() {
            if lines >= enough {
                break;
            }
            lines += self.paper.block(block).len();
        }
        lines
    }

    fn lines_from(&self, spot: Spot, enough: usize) -> usize {
        let mut lines = self.paper.block(spot.block).len().saturating_sub(spot.line);
        for block in spot.block + 1..self.paper.len() {
            if lines >= enough {
                break;
            }
            lines += self.paper.block(block).len();
        }
        lines
    }
}
