import XCTest

@testable import ReaderCore

final class BookshelfTests: ReaderTestCase {
    @MainActor func testShowsWhatIsIncludedAndWhatWasAdded() async throws {
        let included = try write("To be", to: "Hamlet.txt")
        let shelf = Bookshelf(included: [included], folder: folder.appendingPathComponent("books"))
        XCTAssertEqual(shelf.books.map(\.title), ["Hamlet"])
        shelf.add(try write(" Call me Ishmael.\n", to: "Moby Dick.md"))
        XCTAssertNil(shelf.problem)
        XCTAssertEqual(shelf.books.map(\.title), ["Hamlet", "Moby Dick"])
        XCTAssertEqual(try shelf.books[1].text(), "Call me Ishmael.")
        XCTAssertEqual(shelf.books.map { shelf.isAdded($0) }, [false, true])

        let again = Bookshelf(included: [included], folder: folder.appendingPathComponent("books"))
        XCTAssertEqual(again.books, shelf.books)
        again.books.forEach { again.remove($0) }
        XCTAssertEqual(again.books.map(\.title), ["Hamlet"])
    }

    @MainActor func testWhatIsNoTextIsRefused() async throws {
        let shelf = Bookshelf(included: [], folder: folder.appendingPathComponent("books"))
        let picture = folder.appendingPathComponent("picture.txt")
        try Data([0xFF, 0xD8, 0xFF]).write(to: picture)
        for (file, error) in [
            (picture, ReaderError.notText("picture.txt")), (try write(" \n", to: "empty.txt"), .emptyText("empty.txt")),
            (folder.appendingPathComponent("nowhere.txt"), .unreadableFile("nowhere.txt")),
        ] {
            shelf.add(file)
            XCTAssertEqual(shelf.problem, .reader(error))
            XCTAssertEqual(shelf.books, [])
        }
    }
}
