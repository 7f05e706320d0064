//! Places in the lanes: how many batches of each are worked on at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::store::Lane;

/// How many places of each lane are taken.
pub struct Lanes {
    most: usize,
    taken: Mutex<HashMap<Lane, usize>>,
    /// Told whenever a place becomes free.
    freed: Arc<Notify>,
}

/// A place, given back when it is dropped.
pub struct Place {
    lanes: Arc<Lanes>,
    lane: Lane,
}

impl Lanes {
    pub fn new(most: usize, freed: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { most, taken: Mutex::default(), freed })
    }

    pub fn full(&self) -> Vec<Lane> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.iter().filter(|(_, taken)| **taken >= self.most).map(|(lane, _)| lane.clone()).collect()
    }

    /// A place, if there is one.
    pub fn enter(self: &Arc<Self>, lane: Lane) -> Option<Place> {
        let mut lanes = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = lanes.entry(lane.clone()).or_default();
        if *taken >= self.most {
            return None;
        }
        *taken = taken.saturating_add(1);
        Some(Place { lanes: self.clone(), lane })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lanes = self.lanes.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = lanes.get_mut(&self.lane) {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                lanes.remove(&self.lane);
            }
        }
        drop(lanes);
        self.lanes.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_lane_leaves_the_others_their_places() {
        let lanes = Lanes::new(2, Arc::default());
        let (slow, fast) = (Lane::Execute("slow".into()), Lane::Execute("fast".into()));
        let first = lanes.enter(slow.clone()).unwrap();
        let _second = lanes.enter(slow.clone()).unwrap();
        assert!(lanes.enter(slow.clone()).is_none());
        assert_eq!(lanes.full(), std::slice::from_ref(&slow));
        assert!(lanes.enter(fast).is_some());
        drop(first);
        assert!(lanes.full().is_empty() && lanes.enter(slow).is_some());
    }
}
