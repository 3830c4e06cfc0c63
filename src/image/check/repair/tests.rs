use super::super::check;
use super::*;
