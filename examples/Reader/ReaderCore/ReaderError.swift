import Foundation
import TTTKit

/// What goes wrong in the app itself; what goes wrong below is a `TTTError`.
enum ReaderError: Error, Equatable {
    /// A file that is not text in UTF-8.
    case notText(String)
    case emptyText(String)
    case unreadableFile(String)
    /// The app was built without a model in it.
    case noModel
}

/// What a person is told. The views translate the first kind; `TTTKit` has texts of its own.
enum Problem: Equatable {
    case reader(ReaderError)
    case other(String)

    /// Nil for a cancellation, which a person has asked for.
    init?(_ error: any Error) {
        switch error {
        case is CancellationError: return nil
        case let error as ReaderError: self = .reader(error)
        default: self = .other(error.localizedDescription)
        }
    }
}
