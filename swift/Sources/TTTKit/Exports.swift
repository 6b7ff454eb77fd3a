@_exported import TTTFormats  // `TTTError`, `LayerState`: an app imports TTTKit alone
