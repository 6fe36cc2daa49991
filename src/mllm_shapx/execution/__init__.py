"""Running a study: driver, coordinator, workers. Only this package imports ray."""
